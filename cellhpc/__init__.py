"""From raw high-content-screening plates to mechanism of action, on an HPC cluster."""
