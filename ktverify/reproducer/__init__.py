"""Export a case as a self-contained reproducer, and check that it reproduces a reported failure without ktverify."""
