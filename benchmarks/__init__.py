"""What the repository measures and no user installs."""
