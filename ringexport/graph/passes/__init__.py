"""Graph passes of the lowerings, one per file; each says what it needs and what it guarantees."""
