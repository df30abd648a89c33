"""The "hello world" of Hamilton's examples, on its adapter for Ray."""

import hamilton_functions
import pandas as pd
import ray
from hamilton import base, driver
from hamilton.plugins import h_ray

ray.init()
data = {"signups": pd.Series([1, 10, 50, 100, 200, 400]), "spend": pd.Series([10, 10, 20, 40, 40, 50])}
adapter = h_ray.RayGraphAdapter(result_builder=base.PandasDataFrameResult())
dr = driver.Driver(data, hamilton_functions, adapter=adapter)
df = dr.execute(["spend", "signups", "avg_3wk_spend", "spend_per_signup", "spend_zero_mean"])
print(df.to_string())
ray.shutdown()
