"""Front doors: the names and arguments of other attention libraries over this one, each in a package of its own."""
