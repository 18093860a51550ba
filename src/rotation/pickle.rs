//! The pickles in `R.bin`. A pickle is a program; this reader knows only the few instructions that dictionaries of tensors need, refuses
//! every other one and every name outside [`GLOBALS`], and executes nothing.

use std::collections::HashMap;

use crate::{DType, Error, Result, Tensor};

/// The Python names that a file may mention, and what they stand for here.
const GLOBALS: [(&str, Global); 7] = [
    ("collections.OrderedDict", Global::Dict),
    ("torch._utils._rebuild_tensor_v2", Global::Tensor),
    ("torch._utils._rebuild_parameter", Global::Parameter),
    ("torch.DoubleStorage", Global::Storage(DType::F64)),
    ("torch.FloatStorage", Global::Storage(DType::F32)),
    ("torch.HalfStorage", Global::Storage(DType::F16)),
    ("torch.BFloat16Storage", Global::Storage(DType::BF16)),
];

/// The pickle of a dictionary of matrices, each in a storage of its own: "0", "1", …
pub(super) fn pickle(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    fn text(out: &mut Vec<u8>, s: &str) {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    }
    fn integer(out: &mut Vec<u8>, x: usize) {
        match i32::try_from(x) {
            Ok(x) => {
                out.push(b'J');
                out.extend(x.to_le_bytes());
            }
            Err(_) => {
                out.extend([0x8a, 8]); // LONG1 of eight bytes
                out.extend((x as u64).to_le_bytes());
            }
        }
    }
    fn global(out: &mut Vec<u8>, name: &str) {
        let (module, name) = name.rsplit_once('.').expect("a dotted name");
        out.extend(format!("c{module}\n{name}\n").bytes());
    }
    let mut out = vec![0x80, 2, b'}', b'('];
    for (i, (key, t)) in tensors.iter().enumerate() {
        let (storage, _) = GLOBALS
            .into_iter()
            .find(|(_, g)| *g == Global::Storage(t.dtype()))
            .ok_or_else(|| Error::dtype(key, "f64, f32, f16 or bf16", t.dtype()))?;
        text(&mut out, key);
        global(&mut out, "torch._utils._rebuild_tensor_v2");
        out.extend(b"((");
        text(&mut out, "storage");
        global(&mut out, storage);
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        integer(&mut out, t.len());
        out.extend(b"tQ");
        integer(&mut out, 0); // offset
        integer(&mut out, t.rows());
        integer(&mut out, t.cols());
        out.push(0x86);
        integer(&mut out, t.cols()); // strides
        integer(&mut out, 1);
        out.extend([0x86, 0x89]); // no gradient
        global(&mut out, "collections.OrderedDict"); // no hooks
        out.extend(b")RtR");
    }
    out.extend(b"u.");
    Ok(out)
}

/// What a Python name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    Dict,
    Tensor,
    Parameter,
    Storage(DType),
}

/// A value on the pickle's stack; others are referred to by their number.
#[derive(Clone, Debug)]
pub(super) enum Value {
    None,
    Bool,
    Integer(u64),
    Text(String),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Storage { dtype: DType, key: String, len: u64 },
    Tensor(View),
}

/// A tensor: a storage by its number, and what part of it.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) storage: usize,
    pub(super) offset: u64,
    pub(super) size: Vec<u64>,
    pub(super) stride: Vec<u64>,
}

pub(super) type Parsed<T> = std::result::Result<T, String>;

/// The most values that a pickle may make, and the most that may wait on its stack, behind marks or under names: a matrix takes
/// twenty, 4096 layers fewer than a hundred thousand. One byte of a pickle can make a value of fifty.
const MAX_VALUES: usize = 1 << 18;

/// Walks a pickle. Values are numbered and never nested, so that no input makes this recurse or copy much.
pub(super) struct Unpickler<'a> {
    rest: &'a [u8],
    /// Every value that the pickle made, by its number.
    pub(super) values: Vec<Value>,
    stack: Vec<usize>,
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Unpickler<'a> {
    pub(super) fn new(pickle: &'a [u8]) -> Self {
        Self { rest: pickle, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() }
    }

    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or("the pickle is cut off")?;
        self.rest = rest;
        Ok(head)
    }
    fn byte(&mut self) -> Parsed<u8> {
        Ok(self.take(1)?[0])
    }
    fn word(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }
    fn line(&mut self) -> Parsed<&'a str> {
        let end = self.rest.iter().position(|b| *b == b'\n').ok_or("the pickle is cut off")?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name that is not UTF-8".into())
    }
    fn push(&mut self, value: Value) {
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
    }
    fn pop(&mut self) -> Parsed<usize> {
        // Nothing below the last mark may be touched.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes more from its stack than it put there".into());
        }
        Ok(self.stack.pop().expect("longer than the floor"))
    }
    fn top(&self) -> Parsed<usize> {
        self.stack.last().copied().ok_or_else(|| "the pickle reads an empty stack".into())
    }
    fn since_mark(&mut self) -> Parsed<Vec<usize>> {
        let mark = self.marks.pop().ok_or("the pickle lacks a mark")?;
        Ok(self.stack.split_off(mark))
    }
    fn tuple(&mut self, n: usize) -> Parsed<()> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Parsed<Vec<_>>>()?;
        items.reverse();
        self.push(Value::Tuple(items));
        Ok(())
    }
    fn dict(&mut self) -> Parsed<&mut Vec<(usize, usize)>> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(items) => Ok(items),
            other => Err(format!("expected a dictionary to fill, got {}", other.kind())),
        }
    }

    /// Runs the pickle to its end and gives the number of what it made.
    pub(super) fn run(&mut self) -> Parsed<usize> {
        if self.take(2)? != [0x80, 2] {
            return Err("expected a pickle of protocol 2, as torch.save writes".into());
        }
        loop {
            if [self.values.len(), self.stack.len(), self.marks.len(), self.memo.len()].into_iter().any(|n| n > MAX_VALUES) {
                return Err(format!("expected the few values of a dictionary of matrices, got more than {MAX_VALUES}"));
            }
            match self.byte()? {
                b'}' => self.push(Value::Dict(vec![])),
                b'(' => self.marks.push(self.stack.len()),
                b'X' => {
                    let n = self.word()? as usize;
                    let text = std::str::from_utf8(self.take(n)?).map_err(|_| "a string that is not UTF-8")?;
                    self.push(Value::Text(text.into()));
                }
                b'q' => {
                    let (slot, top) = (self.byte()?, self.top()?);
                    self.memo.insert(slot.into(), top);
                }
                b'r' => {
                    let (slot, top) = (self.word()?, self.top()?);
                    self.memo.insert(slot, top);
                }
                b'h' => {
                    let slot = self.byte()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = self.word()?;
                    self.recall(slot)?;
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    let known = GLOBALS.into_iter().find(|(n, _)| *n == name);
                    let (_, global) = known.ok_or_else(|| {
                        format!("the pickle names {name:.200}, which dictionaries of tensors do not need; refused")
                    })?;
                    self.push(Value::Global(global));
                }
                b'K' => {
                    let x = self.byte()?;
                    self.push(Value::Integer(x.into()));
                }
                b'M' => {
                    let x = self.take(2)?;
                    self.push(Value::Integer(u16::from_le_bytes([x[0], x[1]]).into()));
                }
                b'J' => {
                    let x = u64::try_from(self.word()? as i32).map_err(|_| "a negative number")?;
                    self.push(Value::Integer(x));
                }
                0x8a => {
                    let n = self.byte()?.into();
                    let digits = self.take(n)?;
                    if digits.last().is_some_and(|d| d & 0x80 != 0) || digits.iter().skip(8).any(|d| *d != 0) {
                        return Err("a number that is negative or beyond 64 bits".into());
                    }
                    let x = digits.iter().take(8).rev().fold(0, |x, d| x << 8 | u64::from(*d));
                    self.push(Value::Integer(x));
                }
                b'N' => self.push(Value::None),
                0x88 | 0x89 => self.push(Value::Bool),
                b')' => self.push(Value::Tuple(vec![])),
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items));
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.dict()?.push((key, value));
                }
                b'u' => {
                    let items = self.since_mark()?;
                    if !items.len().is_multiple_of(2) {
                        return Err("a dictionary key without a value".into());
                    }
                    self.dict()?.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                }
                b'b' => {
                    // The attributes of an OrderedDict: notes that nobody needs.
                    let state = self.pop()?;
                    if !matches!(self.values[state], Value::Dict(_)) {
                        return Err(format!("expected attributes in a dictionary, got {}", self.values[state].kind()));
                    }
                    self.dict()?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage);
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let value = self.call(function, arguments)?;
                    self.push(value);
                }
                b'.' => return self.pop(),
                other => {
                    return Err(format!(
                        "the pickle instruction {:?} (0x{other:02x}) is not one that torch.save uses; refused",
                        char::from(other)
                    ));
                }
            }
        }
    }

    fn recall(&mut self, slot: u32) -> Parsed<()> {
        let value = *self.memo.get(&slot).ok_or("the pickle recalls what it never stored")?;
        self.stack.push(value);
        Ok(())
    }

    fn items(&self, tuple: usize) -> Parsed<&[usize]> {
        match &self.values[tuple] {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, got {}", other.kind())),
        }
    }
    fn integer(&self, value: usize) -> Parsed<u64> {
        match &self.values[value] {
            Value::Integer(x) => Ok(*x),
            other => Err(format!("expected a number, got {}", other.kind())),
        }
    }
    pub(super) fn text(&self, value: usize) -> Parsed<&str> {
        match &self.values[value] {
            Value::Text(s) => Ok(s),
            other => Err(format!("expected a string, got {}", other.kind())),
        }
    }

    /// `("storage", type, key, location, elements)`
    fn storage(&self, id: usize) -> Parsed<Value> {
        let &[tag, class, key, location, len] = self.items(id)? else {
            return Err("expected a storage of five parts".into());
        };
        if self.text(tag)? != "storage" {
            return Err(format!("expected a storage, got {:.40}", self.text(tag)?));
        }
        self.text(location)?;
        let Value::Global(Global::Storage(dtype)) = self.values[class] else {
            return Err(format!("expected the class of a storage, got {}", self.values[class].kind()));
        };
        let key = self.text(key)?;
        if key.is_empty() || key.len() > 40 || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(format!("expected the name of a storage, got {key:.40?}"));
        }
        Ok(Value::Storage { dtype, key: key.into(), len: self.integer(len)? })
    }

    /// The few constructors that occur.
    fn call(&self, function: usize, arguments: usize) -> Parsed<Value> {
        let Value::Global(global) = self.values[function] else {
            return Err(format!("expected a constructor, got {}", self.values[function].kind()));
        };
        let arguments = self.items(arguments)?;
        match (global, arguments) {
            (Global::Dict, []) => Ok(Value::Dict(vec![])),
            (Global::Parameter, &[data, _, _]) => match &self.values[data] {
                Value::Tensor(view) => Ok(Value::Tensor(view.clone())),
                other => Err(format!("expected the tensor of a parameter, got {}", other.kind())),
            },
            (Global::Tensor, &[storage, offset, size, stride, _, _]) => {
                if !matches!(self.values[storage], Value::Storage { .. }) {
                    return Err(format!("expected the storage of a tensor, got {}", self.values[storage].kind()));
                }
                let integers = |t| {
                    let items = self.items(t)?;
                    if items.len() > 8 {
                        return Err(format!("expected a matrix, got {} axes", items.len()));
                    }
                    items.iter().map(|i| self.integer(*i)).collect::<Parsed<Vec<_>>>()
                };
                Ok(Value::Tensor(View {
                    storage,
                    offset: self.integer(offset)?,
                    size: integers(size)?,
                    stride: integers(stride)?,
                }))
            }
            _ => Err(format!("{global:?} with {} arguments", arguments.len())),
        }
    }
}

impl Value {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Integer(_) => "a number",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a class",
            Self::Storage { .. } => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}
