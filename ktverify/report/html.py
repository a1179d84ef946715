from ktverify.report.store import Run


def page(run: Run) -> str:
    return ""
