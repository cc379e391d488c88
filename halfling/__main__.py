"""`python -m halfling`, as under mpirun and torchrun."""

from halfling import main

main()
