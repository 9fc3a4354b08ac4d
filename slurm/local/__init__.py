"""The parts of `slurm/cluster.py`: settings and files, hosts of namespaces, and the supervisor."""
