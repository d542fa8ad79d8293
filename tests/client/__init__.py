"""Tests of the client, against servers that are sick, hostile or behind TLS."""
