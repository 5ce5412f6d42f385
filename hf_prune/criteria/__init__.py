"""How a weight's worth is scored: one file per criterion, registered under its name. See ADDING.md."""
