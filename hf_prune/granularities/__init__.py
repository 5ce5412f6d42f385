"""What is removed together: one file per granularity, registered under its name. See ADDING.md."""
