"""Tests of the engines: a package, so that its conftest does not hide the other one."""
