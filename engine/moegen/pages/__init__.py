"""The service's pages for people: HTML that needs no scripts. No torch."""
