//! Without the feature `cuda`: nothing. With it: `cuda/*.cu` become one static library of launchers, and `cuda/kernels.h` becomes
//! the Rust declarations of the same launchers. With `capi`, `cuda/spinquant.h` becomes what the C interface is checked against.
//!
//! CUDA_HOME (or CUDA_PATH, or nvcc on PATH) names the toolkit; SPINQUANT_CUDA_ARCHS the architectures, e.g. `80,90a` (default `90a`).
//! The last plain number also gets PTX, so that later cards can compile it. DOCS_RS skips nvcc: documentation needs no toolkit.

fn main() {
    // Without a word about it cargo would build again whenever any file of the repository changed.
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    cuda::build();
}

#[cfg(feature = "cuda")]
#[path = "build/toolkit.rs"]
mod toolkit;

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::toolkit;

    pub fn build() {
        for name in ["CUDA_HOME", "CUDA_PATH", "SPINQUANT_CUDA_ARCHS", "DOCS_RS", "LIBCLANG_PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        println!("cargo::rerun-if-changed=cuda");
        bindings("kernels", "sq_.*");
        if env::var_os("CARGO_FEATURE_CAPI").is_some() {
            bindings("spinquant", "spinquant_.*");
        }
        if env::var_os("DOCS_RS").is_none() {
            kernels(&toolkit::find(|name| env::var_os(name), Path::new("/usr/local/cuda")).unwrap_or_else(|e| fail(&e)));
        }
    }

    /// A header of cuda/ → Rust.
    fn bindings(header: &str, names: &str) {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join(format!("{header}.rs"));
        let generated = std::panic::catch_unwind(|| {
            bindgen::Builder::default()
                .header(format!("cuda/{header}.h"))
                .allowlist_function(names)
                .allowlist_type(names)
                .default_enum_style(bindgen::EnumVariation::Consts)
                .prepend_enum_name(false)
                .derive_default(false)
                .generate()
        });
        match generated {
            Ok(Ok(b)) => b.write_to_file(out).expect("OUT_DIR is writable"),
            Ok(Err(e)) => fail(&format!("bindgen could not read cuda/{header}.h: {e}")),
            Err(_) => fail(
                "libclang was not found, which `--features cuda` needs to read cuda/kernels.h. Install it (Debian: libclang-dev; \
                 or `pip install libclang`) and set LIBCLANG_PATH to the folder of libclang.so if it is not found by itself",
            ),
        }
    }

    /// `80,90a` → -gencode flags; PTX of the last architecture without a suffix (or of the last one's plain form).
    fn architectures() -> Vec<String> {
        let list = env::var("SPINQUANT_CUDA_ARCHS").unwrap_or_else(|_| "90a".into());
        let archs: Vec<&str> = list.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        if archs.is_empty() || archs.iter().any(|a| !a.trim_end_matches(['a', 'f']).bytes().all(|b| b.is_ascii_digit())) {
            fail(&format!("SPINQUANT_CUDA_ARCHS: expected a list such as 80,90a, got {list:?}"));
        }
        let mut flags: Vec<_> = archs.iter().map(|a| format!("arch=compute_{a},code=sm_{a}")).collect();
        if archs.len() > 1 {
            let newest = archs.iter().map(|a| a.trim_end_matches(['a', 'f'])).max_by_key(|a| a.parse::<u32>().unwrap_or(0));
            flags.extend(newest.map(|a| format!("arch=compute_{a},code=compute_{a}")));
        }
        flags
    }

    fn kernels(home: &Path) {
        let mut sources: Vec<_> = std::fs::read_dir("cuda")
            .expect("cuda/ is part of the package")
            .filter_map(|f| f.ok().map(|f| f.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "cu"))
            .collect();
        sources.sort();
        // cc looks for nvcc on PATH.
        let path = toolkit::path_with(home, env::var_os("PATH")).unwrap_or_else(|e| fail(&e));
        // SAFETY: a build script has one thread here.
        unsafe { env::set_var("PATH", path) };
        if Command::new("nvcc").arg("--version").output().is_err() {
            fail(&format!("{} cannot be run", home.join("bin/nvcc").display()));
        }
        // One build a file: several files at once make cc ask for relocatable device code, which costs Hopper kernels dearly.
        let objects: Vec<PathBuf> = std::thread::scope(|scope| {
            let builds: Vec<_> = sources.iter().map(|file| scope.spawn(|| compile(file))).collect();
            builds.into_iter().flat_map(|b| b.join().unwrap_or_else(|_| fail("nvcc failed"))).collect()
        });
        cc::Build::new().cpp(true).objects(objects).compile("spinquant_kernels");
        for lib in ["lib", "lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib/x64"] {
            if home.join(lib).is_dir() {
                println!("cargo::rustc-link-search=native={}", home.join(lib).display());
            }
        }
        // What the static CUDA runtime needs.
        println!("cargo::rustc-link-lib=static=cudart_static");
        if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
            for lib in ["dl", "rt", "pthread"] {
                println!("cargo::rustc-link-lib={lib}");
            }
        }
    }

    fn compile(file: &Path) -> Vec<PathBuf> {
        let mut build = cc::Build::new();
        build.cuda(true).cudart("none").std("c++17").file(file).include("cuda").warnings(false).opt_level(3).debug(false);
        for flag in architectures() {
            build.flag("-gencode").flag(&flag);
        }
        build.flag("--expt-relaxed-constexpr").flag("--extended-lambda");
        if architectures() == ["arch=compute_90a,code=sm_90a"] {
            build.define("SQ_ONLY_SM_90A", None); // for hadamard_choice.h, which then leaves out what such a device never needs
        }
        build.try_compile_intermediates().unwrap_or_else(|e| fail(&format!("nvcc failed on {}: {e}", file.display())))
    }

    fn fail(message: &str) -> ! {
        println!("cargo::error={message}");
        std::process::exit(1);
    }
}
