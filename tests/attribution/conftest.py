"""What the tests of graphs share stands in this folder, which pytest puts on the path for the folders below."""
