"""`tknp bench router`: routers against one another, in front of engines that cost nothing."""
