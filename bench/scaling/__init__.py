"""The planner's model of costs against times that others have published."""
