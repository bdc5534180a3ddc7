"""What became of the maps of hbp 0.1: ``hbp.core.jacobians``."""

raise ImportError(
    "hbp.maps became hbp.core.jacobians. A layer's rules speak of every sample now: "
    "jacobian(self) and parameter_jacobians(self) return maps of all N samples, "
    "second_order(self, J) a tensor [N, ...]; nothing takes a hessian_pass. See the "
    "page Write a layer."
)
