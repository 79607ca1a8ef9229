"""Runs on a cluster: submit, supervise, watch and stop them. Knows no torch."""
