"""The conflict matrix of section 4.1: which sources may be drawn together, and who takes which slot."""
