"""The verdict on an engine: options, fixtures and records come from the package's pytest plug-in."""

pytest_plugins = ["ktverify.pytest_plugin"]
