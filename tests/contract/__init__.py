"""Contracts of tables: their language, exact conversion, and what is proposed."""
