"""One module per subcommand: parse, check what is cheap, call one core function, report.

A command module `name.py` holds the Typer function `name`, whose docstring is the help, and `EXAMPLES`, two or more
`(what it does, command line)` pairs that `--help` shows. It imports torch and the core only inside the function.
"""
