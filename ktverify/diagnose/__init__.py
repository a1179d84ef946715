"""Find the cause of what is wrong with an engine: hypotheses tested on its tensors, ranked by what they explain.

Input: a case, a Target and, where the caller has them, the tensors. Output: a Diagnosis.
"""
