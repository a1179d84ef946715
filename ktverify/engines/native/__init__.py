"""The engine that ships with ktverify: the Python side of the compiled layer."""

ENGINE = "layer:KTMoEWrapper"
