"""``python -m mergekit_bert``: the command line."""

from mergekit_bert.cli import main

main()
