"""One file for each project that this package plugs into; nothing else imports them."""
