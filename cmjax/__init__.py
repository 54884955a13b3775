"""cmjax: a differentiable performance-and-accuracy model of the CloudMatrix384 supernode."""
