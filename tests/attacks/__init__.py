"""Attacks on the library from outside: hostile files; each is made here, and tests try it on every option that reads a file."""
