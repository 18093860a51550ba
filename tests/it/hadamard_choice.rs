//! Which kernel runs for the row lengths of real models. Needs the kernels, but no GPU.

use spinquant::DType;
use spinquant::grid::QuantSpec;
use spinquant::hadamard::Hadamard;
use spinquant::kernels::{Gpu, hadamard_choice};

/// `family PxM` of plain and of quantised rows: 16-bit and f32 on `sm_90a`, then the same on `sm_80`.
#[rustfmt::skip]
const CHOICES: [(usize, [[&str; 4]; 2]); 21] = [
    // n       bf16                 bf16, quantised       f32                  f32, quantised
    (64,    [["butterfly 1x64",     "butterfly 1x64",     "butterfly 1x64",    "butterfly 1x64"],
             ["butterfly 1x64",     "butterfly 1x64",     "butterfly 1x64",    "butterfly 1x64"]]),
    (128,   [["butterfly 1x128",    "butterfly 1x128",    "butterfly 1x128",   "butterfly 1x128"],
             ["butterfly 1x128",    "butterfly 1x128",    "butterfly 1x128",   "butterfly 1x128"]]),
    (4096,  [["direct 1x4096",      "direct 1x4096",      "butterfly 1x4096",  "butterfly 1x4096"],
             ["direct 1x4096",      "direct 1x4096",      "butterfly 1x4096",  "butterfly 1x4096"]]),
    (5120,  [["fragment 40x128",    "fragment 40x128",    "tensor 80x64",      "tensor-held 80x64"],
             ["fragment 40x128",    "fragment 40x128",    "tensor 80x64",      "tensor-held 80x64"]]),
    (5504,  [["tensor 172x32",      "tensor-held 172x32", "tensor 172x32",     "tensor-held 172x32"],
             ["tensor 172x32",      "tensor-held 172x32", "tensor 172x32",     "tensor-held 172x32"]]),
    (8192,  [["direct 1x8192",      "direct 1x8192",      "butterfly 1x8192",  "butterfly 1x8192"],
             ["direct 1x8192",      "direct 1x8192",      "butterfly 1x8192",  "butterfly 1x8192"]]),
    (8960,  [["fragment 140x64",    "warpgroup 140x64",   "tensor 140x64",     "tensor-held 140x64"],
             ["fragment 140x64",    "fragment 140x64",    "tensor 140x64",     "tensor-held 140x64"]]),
    (11008, [["fragment 172x64",    "warpgroup 172x64",   "tensor 172x64",     "tensor-held 172x64"],
             ["fragment 172x64",    "fragment 172x64",    "tensor 172x64",     "tensor-held 172x64"]]),
    (10944, [["core-warpgroup 684x16", "core-warpgroup 684x16", "core 684x16", "core 684x16"],
             ["core 684x16",        "core 684x16",        "core 684x16",       "core 684x16"]]),
    (13696, [["core-warpgroup 428x32", "core-warpgroup 428x32", "core-warpgroup 428x32", "core-warpgroup 428x32"],
             ["core 428x32",        "core 428x32",        "core 428x32",       "core 428x32"]]),
    (13824, [["fragment 108x128",   "warpgroup 108x128",  "tensor 108x128",    "tensor-held 108x128"],
             ["fragment 108x128",   "fragment 108x128",   "tensor 108x128",    "tensor-held 108x128"]]),
    (14336, [["fragment 112x128",   "fragment 56x256",    "tensor 112x128",    "tensor-held 112x128"],
             ["fragment 112x128",   "fragment 56x256",    "tensor 112x128",    "tensor-held 112x128"]]),
    (14848, [["core-warpgroup 464x32", "core-warpgroup 464x32", "core-warpgroup 464x32", "core-warpgroup 464x32"],
             ["core 464x32",        "core 464x32",        "core 464x32",       "core 464x32"]]),
    (18944, [["warpgroup 148x128",  "warpgroup 148x128",  "tensor 148x128",    "tensor-held 148x128"],
             ["fragment 148x128",   "fragment 148x128",   "tensor 148x128",    "tensor-held 148x128"]]),
    (25600, [["fragment 100x256",   "warpgroup 100x256",  "tensor 100x256",    "tensor-held 100x256"],
             ["tensor 100x256",     "tensor-twice 100x256", "tensor 100x256",  "tensor-twice 100x256"]]),
    (27648, [["fragment 108x256",   "warpgroup 108x256",  "tensor 108x256",    "tensor-held 108x256"],
             ["tensor 108x256",     "tensor-twice 108x256", "tensor 108x256",  "tensor-twice 108x256"]]),
    (28672, [["fragment 112x256",   "warpgroup 112x256",  "tensor 112x256",    "tensor-held 112x256"],
             ["tensor 112x256",     "tensor-twice 112x256", "tensor 112x256",  "tensor-twice 112x256"]]),
    // Pairs of rows of H_924 go together.
    (29568, [["core-warpgroup 462x64", "core-warpgroup 462x64", "core-warpgroup 462x64", "core-warpgroup 462x64"],
             ["core 462x64",        "core 462x64",        "any 924x32",        "any 924x32"]]),
    (32768, [["fragment 128x256",   "fragment 128x256",   "butterfly 1x32768", "butterfly 1x32768"],
             ["tensor 128x256",     "tensor-twice 128x256", "butterfly 1x32768", "butterfly 1x32768"]]),
    (53248, [["tensor 104x512",     "tensor-twice 104x512", "any 52x1024",     "any 52x1024"],
             ["none",               "none",               "two-passes 52x1024", "two-passes 52x1024"]]),
    (65536, [["tensor 128x512",     "tensor-twice 128x512", "two-passes 2x32768", "two-passes 2x32768"],
             ["none",               "none",               "two-passes 2x32768", "two-passes 2x32768"]]),
];

#[test]
fn the_kernels_of_the_row_lengths_of_models() {
    let spec = QuantSpec::activation(4, false);
    for (n, expected) in CHOICES {
        let map = Hadamard::new(n).unwrap();
        for (gpu, expected) in [Gpu::SM_90A, Gpu::SM_80].into_iter().zip(expected) {
            let cases = [DType::BF16, DType::F32].into_iter().flat_map(|t| [(t, None), (t, Some(&spec))]);
            for ((dtype, spec), expected) in cases.zip(expected) {
                let choice = hadamard_choice(&map, dtype, spec, gpu);
                let (family, view) = choice.as_ref().map_or(("none", [0, 0]), |c| (c.family, c.view));
                let got = if family == "none" { family.to_owned() } else { format!("{family} {}x{}", view[0], view[1]) };
                assert_eq!(got, expected, "{n} {dtype} {} on {gpu:?}", if spec.is_some() { "quantised" } else { "plain" });
                if let Ok(c) = choice {
                    assert!(c.shared_bytes <= gpu.shared_bytes as usize && c.threads <= 1024, "{c}");
                    if dtype == DType::BF16 {
                        assert_eq!(hadamard_choice(&map, DType::F16, spec, gpu).unwrap(), c);
                    }
                }
            }
        }
    }
}

#[test]
fn rows_without_a_kernel_of_their_own() {
    let choose = |n: usize, dtype, spec: Option<QuantSpec>| {
        hadamard_choice(&Hadamard::new(n).unwrap(), dtype, spec.as_ref(), Gpu::SM_90A).map(|c| c.family)
    };
    let asymmetric = QuantSpec::activation(4, false);
    assert_eq!(choose(2, DType::F32, None).unwrap(), "tiny");
    assert_eq!(choose(12, DType::BF16, None).unwrap(), "any");
    // Groups, and a group as long as the row, whose asymmetric range does not include 0.
    assert_eq!(choose(4096, DType::BF16, Some(asymmetric.grouped(128))).unwrap(), "any");
    assert_eq!(choose(4096, DType::BF16, Some(asymmetric.grouped(4096))).unwrap(), "any");
    assert_eq!(choose(4096, DType::BF16, Some(QuantSpec::activation(4, true).grouped(4096))).unwrap(), "direct");
    assert!(choose(65536, DType::BF16, Some(asymmetric.grouped(128))).is_err());
    assert_eq!(choose(65536, DType::F32, Some(asymmetric.grouped(128))).unwrap(), "two-passes");
    assert!(choose(4096, DType::F64, None).is_err());
    assert!(choose(4096, DType::BF16, Some(asymmetric.grouped(100))).is_err());
}

/// Maps in blocks: rows of their own without quantisation, and one pass with it.
#[test]
fn blocks_of_a_power_of_two() {
    let spec = QuantSpec::activation(4, true);
    let choose = |n, size, dtype, spec: Option<&QuantSpec>| {
        let c = hadamard_choice(&Hadamard::in_blocks(n, size).unwrap(), dtype, spec, Gpu::SM_90A).unwrap();
        format!("{} {}x{}", c.family, c.view[0], c.view[1])
    };
    for (n, size, plain, quantised) in [
        (14336, 2048, "direct 1x2048", "blocks 7x2048"),
        (11008, 256, "butterfly 1x256", "blocks 43x256"),
        (28672, 4096, "direct 1x4096", "blocks 7x4096"),
        (18944, 512, "butterfly 1x512", "blocks 37x512"),
        (29568, 128, "butterfly 1x128", "blocks 231x128"),
        // Few values to a block, too many to a row, and blocks of no power of two.
        (1536, 16, "butterfly 1x16", "any 96x16"),
        (36864, 4096, "direct 1x4096", "any 9x4096"),
        (29568, 4224, "tensor 132x32", "any 924x32"),
    ] {
        assert_eq!(choose(n, size, DType::BF16, None), plain, "{n} by {size}");
        assert_eq!(choose(n, size, DType::BF16, Some(&spec)), quantised, "{n} by {size}");
    }
    assert_eq!(choose(11008, 256, DType::BF16, Some(&spec.grouped(64))), "any 43x256");
    assert_eq!(choose(28672, 4096, DType::F32, Some(&spec)), "blocks 7x4096");
}

/// The table of cuda/README.md, in the words that the choice itself gives.
#[test]
fn the_table_of_the_readme() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/README.md")).unwrap();
    let spec = QuantSpec::activation(4, false);
    let name = |n: usize, dtype, spec: Option<&QuantSpec>, gpu| {
        let choice = hadamard_choice(&Hadamard::new(n).unwrap(), dtype, spec, gpu);
        choice.map_or("none".into(), |c| match c.tiles {
            0 => c.family.to_owned(),
            _ => format!("{} {}x{}", c.family, c.view[0], c.view[1]),
        })
    };
    let mut rows = 0;
    for row in readme.lines().filter(|l| l.starts_with("| ") && l.as_bytes()[2].is_ascii_digit()) {
        let cells: Vec<_> = row.trim_matches(['|', ' ']).split(" | ").collect();
        let n = cells[0].parse().unwrap();
        let kinds = [(DType::BF16, None), (DType::BF16, Some(&spec)), (DType::F32, None), (DType::F32, Some(&spec))];
        assert_eq!(cells.len(), 1 + kinds.len(), "{row}");
        for (cell, (dtype, spec)) in cells[1..].iter().zip(kinds) {
            let [hopper, ampere] = [Gpu::SM_90A, Gpu::SM_80].map(|gpu| name(n, dtype, spec, gpu));
            let expected = if hopper == ampere { hopper } else { format!("{hopper}, `sm_80`: {ampere}") };
            assert_eq!(*cell, expected, "{n} {dtype}");
        }
        rows += 1;
    }
    assert!(rows > 15, "the table has {rows} rows");
}
