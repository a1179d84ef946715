"""`python -m ktverify.golden`: regenerate or check the committed goldens. The code is in `ktverify.judge.golden`."""
