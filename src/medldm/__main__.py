"""`python -m medldm` is `medldm`."""

from medldm.cli import main

main()
