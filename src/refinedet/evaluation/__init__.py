"""How good are detections: ``metrics`` has the pure figures, ``report`` runs a model over data and writes them down."""
