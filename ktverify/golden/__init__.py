"""`python -m ktverify.golden`: regenerate or check the committed goldens."""
