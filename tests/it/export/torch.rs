//! The published `R.bin`.

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

#[test]
fn files_of_torch_are_read_to_the_bit() {
    let want = Rotations::load(&fixture("R.safetensors")).unwrap();
    for name in ["R.bin", "R_parameters.bin"] {
        let r = Rotations::read_torch(&fixture(name)).unwrap();
        assert_eq!(bits(&r), bits(&want), "{name}");
        let exact = Rotations::load_torch(&fixture(name)).unwrap();
        assert_eq!(exact.r1.dtype(), DType::F64);
        for (report, raw) in exact.report().unwrap().iter().zip(r.report().unwrap()) {
            assert!(report.columns_error < 1e-13 && report.rows_error < 1e-13, "{report}");
            assert!(raw.columns_error < 1e-6 && raw.rows_error < 1e-6, "{raw}");
            assert!((report.determinant.abs() - 1.0).abs() < 1e-12, "{report}");
        }
    }
    assert_eq!((want.hidden(), want.head_dim(), want.layers()), (8, 4, 2));
    assert_eq!(want.report().unwrap()[2].name, "R2[1]");
}

#[test]
fn rotations_round_trip_through_torch_files() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.bin"), dir.path().join("b.bin"));
    let r = Rotations::random_orthogonal(24, 8, 12, 3).unwrap();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let r = r.to_dtype(dtype).unwrap();
        r.save_torch(&a).unwrap();
        r.save_torch(&b).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let back = Rotations::read_torch(&a).unwrap();
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        assert_eq!(bits(&back), bits(&r.to_dtype(wide).unwrap()));
    }
    // Projected only where it is needed.
    r.save_torch(&a).unwrap();
    assert_eq!(bits(&Rotations::load_torch(&a).unwrap()), bits(&r));
}

#[test]
fn rotations_that_are_not_orthogonal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.bin");
    let mut r = Rotations::random_orthogonal(16, 8, 2, 3).unwrap();
    let bend = |r2: &Tensor, by: f64| {
        let mut x = r2.to_f64_vec().unwrap();
        x[64] += by;
        Tensor::from_vec(x, r2.shape()).unwrap()
    };
    let straight = r.r2.clone();
    r.r2 = bend(&straight, 1e-2);
    r.save_torch(&path).unwrap();
    let error = r.orthogonality_errors().unwrap().1[1];
    fails(Rotations::load_torch(&path), &["R2[1] is not orthogonal", &format!("{error:.1e}"), "at most 1e-4"]);
    assert!(Rotations::read_torch(&path).is_ok());
    r.r2 = bend(&straight, 3e-5);
    r.save_torch(&path).unwrap();
    let (first, others) = Rotations::load_torch(&path).unwrap().orthogonality_errors().unwrap();
    assert!(first < 1e-13 && others.iter().all(|e| *e < 1e-13), "{first} {others:?}");
    r.r2 = bend(&straight, f64::NAN);
    r.save_torch(&path).unwrap();
    fails(Rotations::read_torch(&path), &["R.bin", "model.layers.1.self_attn.R2 holds NaN"]);
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(StoredEntry)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn pickled(pickle: &[u8]) -> Result<Rotations> {
    let bytes = archive(&[("x/data.pkl", pickle), ("x/data/0", &[0; 64])]);
    Rotations::from_torch_bytes(&bytes, Path::new("R.bin"))
}

/// `{key: tensor}` over storage 0.
fn dictionary(key: &str, class: &str, len: i32, offset: i32, size: [i32; 2], stride: [i32; 2]) -> Vec<u8> {
    let text = |s: &str| [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat();
    let int = |x: i32| [b"J", &x.to_le_bytes()[..]].concat();
    let pair = |[a, b]: [i32; 2]| [int(a), int(b), vec![0x86]].concat();
    [
        b"\x80\x02}(".to_vec(),
        text(key),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("c{class}\n").into_bytes(),
        text("0"),
        text("cpu"),
        int(len),
        b"tQ".to_vec(),
        int(offset),
        pair(size),
        pair(stride),
        b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
    ]
    .concat()
}

#[test]
fn foreign_pickles_are_refused_and_named() {
    let run = b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.";
    fails(pickled(run), &["R.bin", "os.system", "refused"]);
    fails(pickled(b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R."), &["builtins.eval"]);
    fails(pickled(b"\x80\x02ctorch\nLongStorage\n."), &["torch.LongStorage"]);
    // INST, OBJ, NEWOBJ, EXT1, STACK_GLOBAL, INT, GLOBAL by text id: instructions that nothing here needs.
    for op in [b'i', b'o', 0x81, 0x82, 0x93, b'I', b'P', b'd', b'l', b'e', b'0', b'2', 0x8c, 0x95] {
        fails(pickled(&[0x80, 2, b'}', op, b'.']), &["instruction", &format!("0x{op:02x}"), "refused"]);
    }
    fails(pickled(b"\x80\x04}."), &["protocol 2"]);
    fails(pickled(b"\x80\x02}"), &["cut off"]);
    fails(pickled(b"\x80\x02."), &["takes more from its stack"]);
    fails(pickled(b"\x80\x02(}(R."), &["takes more from its stack"]);
    fails(pickled(b"\x80\x02h\x07."), &["recalls what it never stored"]);
    fails(pickled(b"\x80\x02X\xff\xff\xff\xff."), &["cut off"]);
    fails(pickled(b"\x80\x02}q\x00h\x00h\x00s."), &["a key", "got a dictionary"]); // a dictionary inside itself
    fails(pickled(b"\x80\x02}."), &["R1 is missing"]);
    fails(pickled(b"\x80\x02K\x01."), &["expected a dictionary of tensors, got a number"]);
    fails(pickled(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x01."), &["beyond 64 bits"]);
}

#[test]
fn absurd_tensors_are_refused_before_memory_is_taken() {
    let float = "torch\nFloatStorage";
    let of = |len, offset, size, stride| pickled(&dictionary("R1", float, len, offset, size, stride));
    fails(of(i32::MAX, 0, [4, 4], [4, 1]), &["R1", "claims a storage of 2147483647 f32 values", "64 bytes"]);
    fails(of(16, 0, [40000, 40000], [40000, 1]), &["R1", "do not fit its storage of 16"]);
    fails(of(16, 1, [4, 4], [4, 1]), &["R1", "do not fit"]);
    fails(of(16, 0, [4, 4], [0, 0]), &["R1", "strides [0, 0]"]);
    fails(of(16, 0, [4, 2], [4, 1]), &["R1", "square", "4x2"]);
    fails(of(16, 0, [0, 0], [0, 1]), &["R1", "0x0"]);
    fails(of(-1, 0, [4, 4], [4, 1]), &["a negative number"]);
    fails(of(16, 0, [4, 4], [4, 1]), &["model.layers.0.self_attn.R2 is missing"]);
    fails(pickled(&dictionary("R1", "torch\nDoubleStorage", 16, 0, [4, 4], [4, 1])), &["16 f64 values", "64 bytes"]);
    fails(pickled(&dictionary("R4", float, 16, 0, [4, 4], [4, 1])), &["expected R1 and", "R4"]);
    let far = format!("model.layers.{}.self_attn.R2", u64::MAX);
    fails(pickled(&dictionary(&far, float, 16, 0, [4, 4], [4, 1])), &["expected R1 and"]);
    fails(pickled(&dictionary("model.layers.0.self_attn.R2", float, 16, 0, [4, 4], [4, 1])), &["R1 is missing"]);

    // A gap in the layers.
    let both = |second: &str| {
        let first = dictionary("R1", float, 16, 0, [4, 4], [4, 1]);
        let other = dictionary(second, float, 16, 0, [4, 4], [4, 1]);
        [&first[..first.len() - 1], &other[3..]].concat()
    };
    fails(pickled(&both("model.layers.1.self_attn.R2")), &["model.layers.0.self_attn.R2 is missing"]);
    assert!(pickled(&both("model.layers.0.self_attn.R2")).is_ok());
    fails(pickled(&both("R1")), &["R1 occurs twice"]);
}

#[test]
fn damaged_archives() {
    let whole = std::fs::read(fixture("R.bin")).unwrap();
    let read = |bytes: &[u8]| Rotations::from_torch_bytes(bytes, Path::new("R.bin"));
    for cut in (0..whole.len()).step_by(13) {
        fails(read(&whole[..cut]), &["R.bin"]);
    }
    fails(read(b""), &["expected a zip archive", "0 bytes"]);
    fails(read(&archive(&[])), &["data.pkl"]);
    fails(read(&archive(&[("a/data.pkl", b""), ("b/data.pkl", b"")])), &["expected one entry NAME/data.pkl"]);
    let pickle = dictionary("R1", "torch\nFloatStorage", 16, 0, [4, 4], [4, 1]);
    fails(read(&archive(&[("x/data.pkl", &pickle)])), &["lacks the entry x/data/0"]);
    fails(read(&archive(&[("x/data.pkl", &pickle), ("x/byteorder", b"big")])), &["little-endian"]);
    fails(read(&archive(&[("x/data.pkl", &vec![b'}'; (8 << 20) + 1])])), &["data.pkl", "at most"]);
    // A changed value does not agree with its checksum.
    let (r1, _) = whole
        .windows(4)
        .enumerate()
        .find(|(_, w)| *w == Rotations::read_torch(&fixture("R.bin")).unwrap().r1.as_slice::<f32>().unwrap()[0].to_le_bytes())
        .unwrap();
    let mut changed = whole.clone();
    changed[r1] ^= 1;
    fails(read(&changed), &["data/0"]);
    // Flags in the central directory: 8 bytes from its signature the encryption bit, 10 the method.
    let patch = |at: usize, value: u8| {
        let mut bytes = whole.clone();
        let entries: Vec<usize> = (0..bytes.len() - 4).filter(|i| bytes[*i..].starts_with(b"PK\x01\x02")).collect();
        entries.into_iter().for_each(|i| bytes[i + at] |= value);
        bytes
    };
    fails(read(&patch(8, 1)), &["encrypted"]);
    fails(read(&patch(10, 8)), &["compressed"]);
    fails(Rotations::load_torch(Path::new("absent/R.bin")), &["absent"]);
}
