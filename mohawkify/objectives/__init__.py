"""The three stages of MOHAWK: orient, align, distill."""
