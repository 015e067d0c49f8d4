"""What leaves the house: repositories of what passed, their cards, statements and signatures, and hubs that take them."""
