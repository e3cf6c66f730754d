"""`python -m cupyattn`: the command line where no script was installed."""

from .cli import app

app()
