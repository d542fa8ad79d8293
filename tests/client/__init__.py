"""Tests of the client, against servers that are broken, hostile or use TLS."""
