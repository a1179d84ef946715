"""One record, many printers: console, Markdown, HTML and the gate all read the same JSON lines."""
