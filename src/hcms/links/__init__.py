"""Links that stand in where there is none: each is a c10d backend, so that methods and peers run over it unchanged."""
