"""Where jobs run: site files, and a real Slurm cluster on one machine. Not installed with the package cellhpc."""
