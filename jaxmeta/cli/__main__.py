"""`python -m jaxmeta.cli`, for where there is no `jaxmeta` on the path."""

from jaxmeta.cli.main import program

if __name__ == "__main__":
    program()
