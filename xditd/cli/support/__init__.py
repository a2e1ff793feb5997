"""`xditctl support-bundle`: what somebody who is to help must see, in one file, and nothing that is nobody's business."""
