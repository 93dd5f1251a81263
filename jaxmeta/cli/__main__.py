"""Run the command line as `python -m jaxmeta.cli`, where the `jaxmeta` script is not on the path."""

from jaxmeta.cli.main import program

if __name__ == "__main__":
    program()
