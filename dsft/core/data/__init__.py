"""From files and hub data sets to exact token ids with loss masks."""
