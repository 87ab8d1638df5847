"""python -m qwq_lite: the command, where its script is not on the path."""

from qwq_lite.cli import main

main()
