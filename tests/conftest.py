"""The project's own tests: they take the options and fixtures of the package's pytest plug-in."""

pytest_plugins = ["ktverify.pytest_plugin"]
