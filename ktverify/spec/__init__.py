"""What a layer is: the names of its tensors, the cases of the catalogue, and inputs with the same bits everywhere.

Light: `names` and `cases` import no torch.
"""
