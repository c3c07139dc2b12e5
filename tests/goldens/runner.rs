//! Reading and comparing golden cases.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

/// One file of cases.
pub struct Golden {
    pub kind: String,
    pub cases: Vec<Case>,
}

/// One case, with the tensors that it names.
pub struct Case {
    pub name: String,
    pub op: String,
    pub params: Value,
    inputs: HashMap<String, Tensor>,
    outputs: HashMap<String, Tensor>,
}

impl Golden {
    /// Every `*.json` of `dir` with its `*.safetensors`, by name.
    pub fn read_all(dir: &Path) -> Result<Vec<Self>> {
        let entries =
            std::fs::read_dir(dir).with_context(|| format!("no directory {}", dir.display()))?;
        let mut paths: Vec<_> = entries
            .map(|e| Ok(e?.path()))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .filter(|p| p.extension().is_some_and(|e| e == "json"))
            .collect();
        paths.sort();
        ensure!(!paths.is_empty(), "no *.json in {}", dir.display());
        paths.iter().map(|p| Self::read(p).with_context(|| p.display().to_string())).collect()
    }

    fn read(path: &Path) -> Result<Self> {
        let text: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        if text.get("cases").is_none() {
            return Self::rows(path, &text);
        }
        let tensors =
            candle_core::safetensors::load(path.with_extension("safetensors"), &Device::Cpu)?;
        let named = |case: &Value, field: &str| -> Result<HashMap<String, Tensor>> {
            let fields = case[field].as_object().with_context(|| format!("no {field}"))?;
            fields
                .iter()
                .map(|(name, spec)| {
                    let key = spec["tensor"].as_str().context("no tensor name")?;
                    let tensor = tensors.get(key).with_context(|| format!("no tensor {key}"))?;
                    let shape: Vec<usize> = serde_json::from_value(spec["shape"].clone())?;
                    ensure!(tensor.dims() == shape, "{key}: {:?}, not {shape:?}", tensor.dims());
                    Ok((name.clone(), tensor.clone()))
                })
                .collect()
        };
        let cases = text["cases"].as_array().context("cases is no list")?;
        let cases = cases.iter().map(|case| {
            Ok(Case {
                name: case["name"].as_str().context("no name")?.to_string(),
                op: case["op"].as_str().context("no op")?.to_string(),
                params: case["params"].clone(),
                inputs: named(case, "inputs")?,
                outputs: named(case, "outputs")?,
            })
        });
        Ok(Self {
            kind: text["kind"].as_str().context("no kind")?.to_string(),
            cases: cases.collect::<Result<_>>()?,
        })
    }

    /// A file of named tables of rows: each table is a case, its op the name.
    fn rows(path: &Path, text: &Value) -> Result<Self> {
        let tables = text.as_object().context("neither cases nor tables")?;
        let kind = path.file_stem().and_then(|s| s.to_str()).context("no file name")?;
        let case = |(name, params): (&String, &Value)| Case {
            name: name.clone(),
            op: name.clone(),
            params: params.clone(),
            inputs: HashMap::new(),
            outputs: HashMap::new(),
        };
        Ok(Self { kind: kind.to_string(), cases: tables.iter().map(case).collect() })
    }
}

impl Case {
    pub fn input(&self, name: &str) -> Result<&Tensor> {
        self.inputs.get(name).with_context(|| format!("no input {name}"))
    }

    pub fn output(&self, name: &str) -> Result<&Tensor> {
        self.outputs.get(name).with_context(|| format!("no output {name}"))
    }

    pub fn int(&self, name: &str) -> Result<i64> {
        self.params[name].as_i64().with_context(|| format!("no integer {name}"))
    }

    pub fn float(&self, name: &str) -> Result<f64> {
        self.params[name].as_f64().with_context(|| format!("no number {name}"))
    }

    pub fn text(&self, name: &str) -> Result<&str> {
        self.params[name].as_str().with_context(|| format!("no text {name}"))
    }

    pub fn flag(&self, name: &str) -> bool {
        self.params[name].as_bool().unwrap_or(false)
    }

    pub fn pair(&self, name: &str) -> Result<(usize, usize)> {
        Ok(serde_json::from_value(self.params[name].clone())?)
    }

    pub fn indices(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.input(name)?.flatten_all()?.to_vec1::<i64>()?)
    }

    /// Checks `got` against the output `name`, in `f64`, absolute and relative.
    pub fn check(&self, name: &str, got: &Tensor, tolerance: f64) -> Result<()> {
        close(self.output(name)?, got, tolerance).with_context(|| name.to_string())
    }

    /// Checks `f(input)` against the output `name` and its vector-Jacobian product with `cotangent` against `grad`.
    pub fn check_vjp(
        &self,
        input: &str,
        (name, grad): (&str, &str),
        tolerance: f64,
        f: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let x = Var::from_tensor(self.input(input)?)?;
        let y = f(x.as_tensor())?;
        self.check(name, &y, tolerance)?;
        let grads = (y * self.input("cotangent")?)?.sum_all()?.backward()?;
        let got = grads.get(&x).context("no gradient")?;
        self.check(grad, got, tolerance)
    }
}

/// Whether two tensors agree to `tolerance`, absolute plus relative.
pub fn close(want: &Tensor, got: &Tensor, tolerance: f64) -> Result<()> {
    ensure!(want.dims() == got.dims(), "shape {:?}, not {:?}", got.dims(), want.dims());
    let values =
        |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) };
    for (i, (w, g)) in values(want)?.into_iter().zip(values(got)?).enumerate() {
        // not `>`: a NaN must fail
        if (w - g).abs() <= tolerance * (1.0 + w.abs()) {
            continue;
        }
        bail!("value {i}: {g:e}, not {w:e} (tolerance {tolerance:e})");
    }
    Ok(())
}
