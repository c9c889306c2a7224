"""What surrounds the client and the workers where there is no Docker. Starts them as processes; never imports them."""
