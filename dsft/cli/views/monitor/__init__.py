"""The pictures of `dsft monitor`: a sample and its history into lines of a known width; pure functions."""
