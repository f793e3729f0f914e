"""Verifiers of others, speaking the command protocol. None of them is a dependency of this project's."""
